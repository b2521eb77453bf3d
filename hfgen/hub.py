"""How diffusers gets to know the library name ``hfgen``.

``model_index.json`` stores a component as ``["hfgen", "VARTransformer"]``. diffusers writes and accepts this, from a
folder and from the Hub, only if ``hfgen`` is a key of ``LOADABLE_CLASSES`` in
``diffusers.pipelines.pipeline_loading_utils``; else it stores the path of the defining module, and refuses such a
pipeline when it comes from the Hub.

That module takes over a second to import, because it pulls in most of transformers and accelerate. So hfgen does not
import it: an entry in ``sys.meta_path`` adds the key right after somebody else has, which is before any pipeline or
component can be loaded.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The base class of a component tells diffusers how to save and load it; it looks for the class in the component's
# library, so hfgen forwards these names to the packages that define them.
BASE_CLASSES = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizer": "transformers",
    "PreTrainedTokenizerFast": "transformers",
    "ProcessorMixin": "transformers",
    "ImageProcessingMixin": "transformers",
    "FeatureExtractionMixin": "transformers",
}

_LIBRARY = "hfgen"
_LOADING_UTILS = "diffusers.pipelines.pipeline_loading_utils"


def register_library() -> None:
    """Make ``hfgen`` a library that diffusers loads components from, now or as soon as its loader is imported."""
    if _LOADING_UTILS in sys.modules:
        _add_library(sys.modules[_LOADING_UTILS])
    sys.meta_path.insert(0, _LoadingUtilsFinder())


def _add_library(loading_utils: ModuleType) -> None:
    methods = ["save_pretrained", "from_pretrained"]
    loading_utils.LOADABLE_CLASSES[_LIBRARY] = dict.fromkeys(BASE_CLASSES, methods)


class _LoadingUtilsFinder(MetaPathFinder):
    """Finds one module, the usual way, and has the library added once the module has run."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != _LOADING_UTILS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            _add_library(module)

        spec.loader.exec_module = exec_module
        return spec
