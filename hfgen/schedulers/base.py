"""What the diffusion and flow schedulers of hfgen share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hfgen.models.modeling import PortableConfigMixin
from hfgen.models.untrusted import check_arguments


class HFGenScheduler(PortableConfigMixin, SchedulerMixin, ConfigMixin):
    """A diffusers scheduler with published settings, whose configuration is checked before it is used."""

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def from_preset(cls, name: str) -> HFGenScheduler:
        """The published settings of a system.

        Raises:
            ValueError: unknown name.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; known are: {', '.join(cls.presets) or 'none'}.")
        return cls(**cls.presets[name])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """As in diffusers, after a check of the types, since the configuration can be anybody's.

        Raises:
            ValueError: an argument of a wrong type or out of range.
        """
        known = inspect.signature(cls.__init__).parameters
        check_arguments(cls, {name: value for name, value in {**config, **kwargs}.items() if name in known})
        return super().from_config(config, return_unused_kwargs, **kwargs)
