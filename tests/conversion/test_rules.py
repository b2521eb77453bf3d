"""The rule engine: renaming, tensor operations, completeness, and the way back."""

import pytest
import torch

from hfgen.conversion.rules import Chain, Derived, Drop, Rule, Split, Squeeze, convert, original_name, revert

RULES = [
    Rule("layers.{i}.shortcut.{p}", "blocks.{i}.conv_shortcut.{p}"),
    Rule("layers.{i}.{name:norm1|norm2}.{p}", "blocks.{i}.{name}.{p}"),
    Rule(
        "layers.{i}.qkv",
        ("blocks.{i}.to_q", "blocks.{i}.to_k", "blocks.{i}.to_v"),
        Chain((Squeeze((2, 3)), Split(3))),
    ),
    Rule("scale", "log_scale", Squeeze((0, 2, 3))),
    Derived("mask", lambda: torch.tensor([0.0, -torch.inf])),
    Derived("hits", lambda: torch.zeros(2), check=False),
    Drop("loss_network.{rest:.+}"),
]


def official():
    state = {"scale": torch.randn(1, 4, 1, 1), "mask": torch.tensor([0.0, -torch.inf]), "hits": torch.zeros(2)}
    for i in (0, 11):
        state[f"layers.{i}.qkv"] = torch.randn(6, 5, 1, 1)
        state[f"layers.{i}.shortcut.weight"] = torch.randn(3)
        state[f"layers.{i}.norm1.weight"] = torch.randn(3)
        state[f"layers.{i}.norm2.bias"] = torch.randn(3)
    return state


def test_names_and_values():
    state = official()
    converted = convert(state, RULES)
    assert len(converted) == 13
    assert torch.equal(converted["blocks.11.to_k"], state["layers.11.qkv"][2:4, :, 0, 0])
    assert torch.equal(converted["log_scale"], state["scale"].flatten())
    assert converted["blocks.0.conv_shortcut.weight"] is state["layers.0.shortcut.weight"]
    assert converted["blocks.11.norm2.bias"] is state["layers.11.norm2.bias"]


def test_the_way_back_restores_everything_that_can_be_made_again():
    state = official()
    back = revert(convert(state | {"loss_network.net.0.weight": torch.ones(1)}, RULES), RULES)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


def test_input_is_not_changed():
    state = official()
    copies = {name: value.clone() for name, value in state.items()}
    convert(state, RULES)
    assert state.keys() == copies.keys()
    assert all(torch.equal(state[name], copies[name]) for name in state)


def test_first_fitting_rule_wins():
    rules = [Rule("a.{x:[0-9]+}", "number.{x}"), Rule("a.{x}", "other.{x}")]
    state = {"a.1": torch.zeros(1), "a.b": torch.ones(1)}
    assert convert(state, rules).keys() == {"number.1", "other.b"}
    assert revert(convert(state, rules), rules).keys() == state.keys()


def test_several_sources_of_one_target():
    class Concatenate:
        def forward(self, *tensors):
            return (torch.cat(tensors),)

        def inverse(self, tensor):
            return tensor.chunk(2)

    rules = [Rule(("{i}.a", "{i}.b"), "{i}.ab", Concatenate())]
    state = {"0.a": torch.zeros(1), "0.b": torch.ones(1)}
    converted = convert(state, rules)
    assert torch.equal(converted["0.ab"], torch.tensor([0.0, 1.0]))
    assert torch.equal(revert(converted, rules)["0.b"], state["0.b"])
    with pytest.raises(ValueError, match="1 missing: 0.b"):
        convert({"0.a": torch.zeros(1)}, rules)


def test_a_field_means_the_same_wherever_it_occurs():
    rules = [Rule("{a}.{b}.{a}", "{b}.{a}")]
    assert convert({"x.y.x": torch.zeros(1)}, rules).keys() == {"y.x"}
    with pytest.raises(ValueError, match=r"1 unknown: x\.y\.z"):
        convert({"x.y.z": torch.zeros(1)}, rules)


def test_templates_with_different_fields_are_refused():
    with pytest.raises(ValueError, match="differ in their fields"):
        Rule("a.{i}", "b.{j}")


def test_dots_in_templates_are_literal():
    with pytest.raises(ValueError, match="1 unknown: aXb"):
        convert({"aXb": torch.zeros(1)}, [Rule("a.b", "c")])


def test_unknown_names_are_listed_up_to_ten():
    state = official() | {f"extra.{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"12 unknown: extra\.00, .*extra\.09 and 2 more\.$") as error:
        convert(state, RULES)
    assert "extra.10" not in str(error.value)


def test_missing_names_are_the_official_ones():
    state = official()
    expected = {name: value.shape for name, value in convert(state, RULES).items()}
    del state["layers.11.qkv"], state["scale"]
    with pytest.raises(ValueError, match=r"2 missing: layers\.11\.qkv, scale\.$"):
        convert(state, RULES, expected)


def test_names_that_the_model_lacks_are_unknown():
    state = official()
    expected = {name: value.shape for name, value in convert(state, RULES).items() if name != "log_scale"}
    with pytest.raises(ValueError, match="1 unknown: scale"):
        convert(state, RULES, expected)


def test_wrong_shapes_tell_both_shapes():
    state = official()
    expected = {name: value.shape for name, value in convert(state, RULES).items()}
    state["layers.0.norm1.weight"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"1 wrong: layers\.0\.norm1\.weight .*\(4,\) where \(3,\) is needed"):
        convert(state, RULES, expected)


@pytest.mark.parametrize("value", [torch.zeros(7, 5, 1, 1), torch.zeros(6, 5, 3, 3), torch.zeros(6, 5)])
def test_operations_that_do_not_fit_name_the_tensor(value):
    with pytest.raises(ValueError, match=r"1 wrong: layers\.0\.qkv"):
        convert(official() | {"layers.0.qkv": value}, RULES)


def test_two_sources_of_one_name():
    with pytest.raises(ValueError, match="second source of c"):
        convert({"a": torch.zeros(1), "b": torch.zeros(1)}, [Rule("a", "c"), Rule("b", "c")])


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(3)])
def test_derived_tensors_must_have_the_derived_value(value):
    with pytest.raises(ValueError, match="1 wrong: mask"):
        convert(official() | {"mask": value}, RULES)


def test_derived_tensors_may_be_absent_or_of_lower_precision():
    state = official()
    assert "mask" not in convert(state | {"mask": state["mask"].half()}, RULES)
    del state["mask"]
    assert "mask" in revert(convert(state, RULES), RULES)


def test_statistics_are_not_checked():
    convert(official() | {"hits": torch.ones(5)}, RULES)


def test_reverting_names_what_is_unknown_or_missing():
    state = convert(official(), RULES)
    with pytest.raises(ValueError, match="hfgen state dict does not fit.* 1 unknown: other"):
        revert(state | {"other": torch.zeros(1)}, RULES)
    del state["blocks.0.to_k"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.0\.to_k"):
        revert(state, RULES)


def test_original_name():
    assert original_name("blocks.11.to_v", RULES) == ("layers.11.qkv",)
    with pytest.raises(ValueError, match="No rule produces 'nothing'"):
        original_name("nothing", RULES)
