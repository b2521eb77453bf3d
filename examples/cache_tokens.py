"""Write the codes of a data set into a cache, which every training script of a generator takes with --cache.

    accelerate launch examples/cache_tokens.py --tokenizer runs/tokenizer/final --output_dir runs/codes
    accelerate launch examples/train_var.py --tokenizer runs/tokenizer/final --cache runs/codes --output_dir runs/var

A run that was interrupted continues when the same command is given again, with any number of processes. With --flip or
--crop random, --variants 10 keeps ten augmented versions of each image. --push_to USER/NAME publishes the cache.
"""

from hfgen import AutoModel
from hfgen.training import CacheConfig, build_cache, loading_flag, script

Config = CacheConfig


@script(Config, __doc__)
def main(config: Config) -> None:
    with loading_flag("tokenizer", config.tokenizer):
        tokenizer = AutoModel.from_pretrained(config.tokenizer, subfolder=config.subfolder)
    if getattr(tokenizer, "codebook_size", None) is None:
        raise ValueError(f"{config.tokenizer} has no codebook: use cache_latents.py for a continuous tokenizer.")
    build_cache(config, tokenizer)


if __name__ == "__main__":
    main()
