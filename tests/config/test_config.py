"""Options: types, ranges, cross-checks, and that every one of them is read."""

import dataclasses
import importlib
import json
import pathlib
import re

import pytest

from modse_jax import errors
from modse_jax.config import loading, migration, options, reference

ROOT = pathlib.Path(__file__).parents[2]


def changed(**flat):
    values = loading.default_config()
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in flat.items()})
    return values.to_dict()


def test_defaults_survive_a_round_trip():
    assert loading.from_dict(loading.default_config().to_dict()) == options.Config()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model__dim", 0, "model.dim=0 must be >= 2"),
        ("model__num_heads", 3, "model.dim=256 is not divisible by model.num_heads=3"),
        ("model__num_heads", 256, "must be even"),
        ("model__num_kv_heads", 3, "is not divisible by model.num_kv_heads=3"),
        ("model__dtype", "float16", "must be one of float32, bfloat16"),
        ("moe__top_k", 9, "moe.top_k=9 is larger than moe.num_experts=8; lower the first"),
        ("moe__widths", (4, 4), "moe.widths: 2 widths for 8 experts; give one width for each"),
        ("moe__pools", ((2, 9, 3),), "has top_k=3, more than its 2 experts; lower its top_k"),
        ("moe__widths", (4, -1, 4, 4, 4, 4, 4, 4), "expert 1 has width -1"),
        ("moe__gate", "sigmoids", "must be one of top_k_softmax"),
        ("moe__capacity_factor", -1.0, "must be >= 0"),
        ("moe__capacity_factor", 1e-6, "moe.capacity_factor=1e-06 must be 0, so that no token"),
        ("evaluation__capacity_factor", 1e30, "evaluation.capacity_factor=1e+30 must be 0, so"),
        (
            "data__sequence_length",
            1024,
            "data.sequence_length=1024 is longer than model.context_length=512",
        ),
        ("data__validation_fraction", 1.0, "must be < 1"),
        (
            "training__gradient_accumulation",
            3,
            "is not divisible by training.gradient_accumulation=3",
        ),
        ("optimizer__learning_rate", float("nan"), "must be finite"),
        ("optimizer__initial_learning_rate", 1.0, "is above the peak"),
        ("optimizer__first_step", 2, "optimizer.first_step=2 must be < 2"),
        ("evaluation__top_p", 1.5, "must be <= 1"),
        ("mesh__data", 0, "mesh.data=0, mesh.fsdp=1, mesh.expert=1: each must be"),
        ("evaluation__prompts", (), "must be non-empty texts"),
    ],
)
def test_bad_values_are_refused_by_name(name, value, message):
    with pytest.raises(errors.UserError, match=re.escape(message)):
        loading.from_dict(changed(**{name: value}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(moe__shared_width=64),
            "moe.shared_width=64 needs a placement: set moe.shared_placement=in_layer",
        ),
        (
            dict(moe__shared_placement="parallel"),
            "moe.shared_placement=parallel needs a shared expert: set moe.shared_width above 0",
        ),
        (
            dict(moe__shared_width=64, moe__shared_placement="in_layer", model__dense_width=512),
            "moe.shared_width=64 needs MoE layers, but model.dense_width=512 replaces them",
        ),
        (dict(moe__shared_placement="parralel"), "must be one of none, in_layer, parallel"),
        (dict(model__norm_position="middle"), "must be one of pre, post"),
        (dict(model__qk_norm="head"), "must be one of none, full"),
        (dict(model__init_std=-0.1), "model.init_std=-0.1 must be >= 0"),
    ],
)
def test_bad_forms_of_a_block_are_refused(changes, message):
    with pytest.raises(errors.UserError, match=re.escape(message)):
        loading.from_dict(changed(**changes))


def test_a_dense_model_has_no_experts():
    unused = dict(moe__pairs=True, moe__gate="uniform", moe__bias_rule="sign", moe__top_k=9)
    unused |= dict(moe__exchange="all_to_all", moe__placement="split", moe__capacity_factor=1.0)
    config = loading.from_dict(changed(model__dense_width=512, **unused))
    assert (config.widths, config.pools, config.num_experts, config.top_k) == ((), (), 0, 0)
    assert config.active_width == 512


def test_pairs_that_do_not_sum_are_refused():
    values = changed(moe__widths=(9, 1, 8, 2, 6, 4, 5, 4), moe__width=5, moe__pairs=True)
    with pytest.raises(
        errors.UserError, match="experts 6 and 7 of widths 5 \\+ 4 = 9 must sum to 2 \\* width = 10"
    ):
        loading.from_dict(values)


def test_types_and_unknown_names_are_refused():
    values = loading.default_config().to_dict()
    for section, name, value, message in (
        ("model", "dim", 1.5, "model.dim=1.5 must be of type int"),
        ("model", "dim", True, "model.dim=True must be of type int"),
        ("moe", "widths", (768, 768.5), "must be a tuple of int"),
        ("moe", "expert_count", 8, "unknown option moe.expert_count; known:"),
        ("moe", "width_s", (), "did you mean moe.width"),
    ):
        with pytest.raises(errors.UserError, match=message):
            loading.from_dict({**values, section: {**values[section], name: value}})
    whole = loading.from_dict({**values, "optimizer": {**values["optimizer"], "weight_decay": 1}})
    assert whole.optimizer.weight_decay == 1.0
    with pytest.raises(errors.UserError, match="config lacks moe.top_k"):
        loading.from_dict(
            {**values, "moe": {k: v for k, v in values["moe"].items() if k != "top_k"}}
        )


def test_a_saved_config_of_an_older_version_takes_the_defaults(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(migration, "_reported", set())
    saved = changed(moe__top_k=1, training__steps=7)
    del saved["advanced"]["tail_rows"], saved["data"]["packing"], saved["checkpoint"], saved["seed"]
    del saved["optimizer"]["first_step"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    values = json.loads(path.read_text())
    config = loading.from_saved(values)
    assert values == json.loads(path.read_text())  # unchanged by reading
    assert config == loading.from_dict(changed(moe__top_k=1, training__steps=7))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for added in (
        "seed=0",
        "data.packing='concat'",
        "advanced.tail_rows=64",
        "optimizer.first_step=0",
        "checkpoint.keep=3",
        "checkpoint.keep_every=0",
    ):
        assert added in message
    assert message.count("=") == 6
    assert loading.from_saved(changed()) == options.Config()
    assert capsys.readouterr().err == ""


def test_a_saved_config_with_an_unknown_option_is_refused():
    saved = changed()
    del saved["advanced"]["tail_rows"]
    saved["advanced"]["tail_row"] = 64
    with pytest.raises(errors.UserError, match="did you mean advanced.tail_rows"):
        loading.from_saved(saved)
    with pytest.raises(errors.UserError, match="moe=8 must be a section of options"):
        loading.from_saved({**changed(), "moe": 8})


def test_differences_name_the_option():
    new = dataclasses.replace(
        options.Config(), seed=3, moe=dataclasses.replace(options.MoEConfig(), top_k=1)
    )
    assert loading.differences(options.Config(), new) == ["seed: 0 -> 3", "moe.top_k: 2 -> 1"]


def test_resumable_names_exist():
    assert set(loading.RESUMABLE) <= {path for path, _ in options.fields()}


def test_the_options_page_is_the_generated_table():
    assert reference.markdown_table() in (ROOT / "docs" / "options.md").read_text()


def test_every_config_file_is_a_document_that_builds():
    files = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "configs" / "study").glob("*.py")])
    assert len(files) >= 18
    for path in files:
        name = path.relative_to(ROOT)
        module = importlib.import_module(".".join(name.with_suffix("").parts))
        assert f"--config={name}" in module.__doc__, f"{name}: the docstring lacks its command"
        config = loading.from_dict(module.get_config().to_dict())
        if "study" in name.parts:  # docs/study.md: a name after the colon selects another size
            larger = loading.from_dict(module.get_config("200M").to_dict())
            assert larger.model.dim == 640 and config.model.dim == 240
            assert larger.active_width == larger.moe.flop_matched_width == 4 * 640


def test_pairs_of_a_size_without_whole_widths_are_refused():
    from configs.study import modse_pairs

    with pytest.raises(errors.UserError, match="dense width, 192, is not .*; choose 50M, 200M or"):
        modse_pairs.get_config("10M")
