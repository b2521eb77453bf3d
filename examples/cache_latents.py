"""Write the latents of a data set into a cache, which every training script of a generator takes with --cache.

    accelerate launch examples/cache_latents.py --tokenizer stabilityai/sd-vae-ft-mse --dataset images \\
      --resolution 256 --flip --variants 2 --output_dir runs/latents

The tokenizer is a diffusers.AutoencoderKL or a continuous tokenizer of hfgen. Of a KL autoencoder the mean and the
log-variance are kept, so that every training step draws its own sample of the posterior. A run that was interrupted
continues when the same command is given again, with any number of processes. --push_to USER/NAME publishes the cache.
"""

from hfgen.training import CacheConfig, build_cache, loading_flag, script
from hfgen.training.token_encoding import load_image_tokenizer

Config = CacheConfig


@script(Config, __doc__)
def main(config: Config) -> None:
    with loading_flag("tokenizer", config.tokenizer):
        tokenizer = load_image_tokenizer(config.tokenizer, config.subfolder)
    if getattr(tokenizer, "codebook_size", None) is not None:
        raise ValueError(f"{config.tokenizer} has a codebook: use cache_tokens.py for its codes.")
    build_cache(config, tokenizer)


if __name__ == "__main__":
    main()
