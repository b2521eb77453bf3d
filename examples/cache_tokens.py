"""Write the codes of a data set into a cache, which every training script of a generator takes with --cache.

    accelerate launch examples/cache_tokens.py --tokenizer runs/tokenizer/final --output_dir runs/codes
    accelerate launch examples/train_var.py --tokenizer runs/tokenizer/final --cache runs/codes --output_dir runs/var

A run that was interrupted continues when the same command is given again, with any number of processes. With --flip or
--crop random, --variants 10 keeps ten augmented versions of each image. --push_to USER/NAME publishes the cache.
"""

from hfgen.training import CacheConfig, build_cache, script
from hfgen.training.token_encoding import load_code_tokenizer

Config = CacheConfig


@script(Config, __doc__)
def main(config: Config) -> None:
    build_cache(config, load_code_tokenizer(config.tokenizer, config.subfolder))


if __name__ == "__main__":
    main()
