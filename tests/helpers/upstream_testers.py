"""The common model tests of a transformers source distribution on our tiny models, for scripts/upstream_tests.py.

A source distribution has ``tests/test_modeling_common.py``, but no tests of single models, and neither of the mixins
that test generation and export. Here is one test case per model type, with its name: the common tests on a tiny model.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

from scripts.upstream_tests import CHECKOUT, MODEL_TYPES
from tests.helpers.patches_models import is_new_enough
from tests.helpers.tiny_types import build

PACKAGE = "upstream_tests"  # `tests` is ours
MISSING = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}


def common_tests(checkout: Path) -> ModuleType:
    """Import upstream's common tests, with empty mixins for those that the checkout lacks."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(checkout / "tests")]
    sys.modules[PACKAGE] = package
    for module, mixin in MISSING.items():
        if not (checkout / "tests" / module.replace(".", "/")).with_suffix(".py").exists():
            empty = ModuleType(f"{PACKAGE}.{module}")
            setattr(empty, mixin, type(mixin, (), {}))
            sys.modules[empty.__name__] = empty
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


class Tester:
    """What the common tests read of a model tester: a configuration with inputs, and their sizes."""

    is_training = True

    def __init__(self, model_type: str) -> None:
        model, self.inputs = build(model_type)
        self.config = model.config
        text = self.config.text_config
        self.batch_size, self.seq_length = self.inputs["input_ids"].shape
        self.hidden_size, self.num_attention_heads = text.hidden_size, text.num_attention_heads
        self.num_hidden_layers = text.num_hidden_layers  # as many as in the vision tower

    def get_config(self) -> Any:
        return type(self.config).from_dict(self.config.to_dict())  # without the attention chosen for the built model

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return self.get_config(), copy.deepcopy(self.inputs)


def case(model_type: str, common: ModuleType) -> type[unittest.TestCase]:
    """Make the test case of a model type, of its base model and its model with a head."""
    tester = Tester(model_type)
    classes = (MODEL_MAPPING[type(tester.config)], MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(tester.config)])
    mixin = sys.modules[f"{PACKAGE}.generation.test_utils"].GenerationTesterMixin
    attributes = {
        "model_tester": tester,
        "all_model_classes": classes,
        "_is_composite": True,
        "test_all_params_have_gradient": False,  # LLaVA leaves the last layers of its tower unused
        "skip_test_image_features_output_shape": True,  # there are several tiles, or patches, of an image
        "skip_test_video_features_output_shape": True,
        "__module__": __name__,
    }
    return type(model_type, (common.ModelTesterMixin, mixin, unittest.TestCase), attributes)


common = common_tests(Path(os.environ[CHECKOUT]))
globals().update({name: case(name, common) for name in MODEL_TYPES if is_new_enough(name)})
