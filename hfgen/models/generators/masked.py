"""What the masked-token generators share: their interface, and the check of what goes in."""

from __future__ import annotations

from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from hfgen.models.modeling import GeneratorOutput, HFGenModel


class MaskedTokenTransformer(HFGenModel):
    """A bidirectional transformer over a class token and N image tokens, some of which are masked.

    Subclasses have the constructor arguments ``num_codes``, ``num_tokens`` and ``num_classes`` and define

    - ``encode_tokens(codes, class_labels)``: the last hidden states (B, 1 + N, C), class token first;
    - ``logits_of(hidden_states)``: (..., C) -> (..., num_codes) float32;
    - ``default_scheduler``: the preset of :class:`~hfgen.schedulers.masked_token.MaskedTokenScheduler` that the
      published weights with about as many tokens are sampled with.
    """

    default_scheduler: str

    @property
    def mask_token_id(self) -> int:
        """The id of a masked token among the codes, whatever row of the embedding that is."""
        return self.config.num_codes

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.config.num_tokens

    @property
    def unconditional_label(self) -> int | None:
        """The label without a class, None if the model has none and so cannot be guided."""
        return self.config.num_classes

    @apply_forward_hook
    def forward_positions(self, codes: Tensor, class_labels: Tensor, positions: Tensor) -> Tensor:
        """The logits of some tokens only, which is what sampling needs. The values of the ids are not checked.

        Args:
            codes, class_labels: as for :meth:`forward`.
            positions: (B, M) int64 in [0, N).

        Returns:
            (B, M, num_codes) float32.
        """
        hidden_states = self.encode_tokens(codes, class_labels)
        rows = (positions + 1)[..., None].expand(-1, -1, hidden_states.shape[-1])
        return self.logits_of(hidden_states.gather(1, rows))

    def forward(
        self, codes: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> GeneratorOutput | tuple[Tensor]:
        """The logits of all tokens.

        Args:
            codes: (B, N) int64 in [0, num_codes]; ``num_codes``, the ``mask_token_id``, marks a masked token.
            class_labels: (B,) int64 in [0, num_classes]; ``num_classes`` is the unconditional label, if the model has
                one.

        Returns:
            ``logits`` (B, N, num_codes) float32.

        Raises:
            ValueError: a wrong number of codes, or an id out of range.
        """
        self.check_codes(codes)
        last = self.config.num_classes - (self.unconditional_label is None)
        if class_labels.shape != codes.shape[:1]:
            raise ValueError(
                f"class_labels have shape {tuple(class_labels.shape)}, expected one label for each of the "
                f"{len(codes)} rows of codes."
            )
        if class_labels.min() < 0 or class_labels.max() > last:
            raise ValueError(
                f"class_labels lie in [{class_labels.min()}, {class_labels.max()}], expected [0, {last}]."
            )
        logits = self.logits_of(self.encode_tokens(codes, class_labels)[:, 1:])
        if not return_dict:
            return (logits,)
        return GeneratorOutput(logits=logits)

    def check_codes(self, codes: Tensor) -> None:
        """Raises ``ValueError`` unless ``codes`` are (B, N) int64 in [0, num_codes]."""
        num_codes, num_tokens = self.config.num_codes, self.config.num_tokens
        if codes.ndim != 2 or codes.shape[1] != num_tokens:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, expected (batch, {num_tokens}): the transformer was built "
                f"for {num_tokens} tokens."
            )
        if codes.numel() and (codes.min() < 0 or codes.max() > num_codes):
            raise ValueError(
                f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {num_codes - 1}], or {num_codes} for a "
                "masked token. Do tokenizer and transformer have the same codebook?"
            )
