"""Imports go downward only, as the layers stand here, lowest first."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


LAYERS = [
    {"modse_jax.chips", "modse_jax.gpu_options", "modse_jax.integrity", "modse_jax.moe.sizing"},
    {"modse_jax.moe.expert_tasks", "modse_jax.moe.expert_padding"},
    {
        "modse_jax.moe.expert_ffn_blocked",
        "modse_jax.moe.expert_ffn_tpu",
        "modse_jax.moe.expert_ffn_gpu",
        "modse_jax.moe.expert_ffn_triton",
        "modse_jax.moe.expert_kernels",
    },
    {"modse_jax.config"},
    {"modse_jax.lock"},
    {
        "modse_jax.moe.router",
        "modse_jax.moe.dispatch",
        "modse_jax.moe.exchange",
        "modse_jax.moe.expert_ffn",
    },
    {"modse_jax.processes", "modse_jax.gpu_compiler"},
    {"modse_jax.mesh", "modse_jax.command_line"},
    {"modse_jax.moe.layer"},
    {"modse_jax.model"},
    {"modse_jax.data"},
    {"modse_jax.training"},
    {"modse_jax.evaluation"},
    {"train", "eval", "configs"},
]


def level(module):
    """Index of the layer of a module: the one with the longest name that is the module or holds it."""
    found = [
        (len(name), i)
        for i, layer in enumerate(LAYERS)
        for name in layer
        if module == name or module.startswith(name + ".")
    ]
    assert found, f"{module} is in no layer; give it a place here"
    return max(found)[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    for path in [*(ROOT / "modse_jax").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def test_imports_go_downward():
    names = dict(modules())
    upward = []
    for module, path in names.items():
        for imported in imports(path):
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names and level(target) > level(module):
                upward.append(f"{module} imports {target}")
    assert len(names) > 20 and not upward


def test_only_the_layer_and_kernels_that_xla_cannot_cut_use_shard_map():
    found = {module for module, path in modules() if "shard_map(" in path.read_text()}
    assert found == {
        "modse_jax.moe.layer",
        "modse_jax.model.attention",
        "modse_jax.model.embedding",
    }


def test_no_pickle():
    for _, path in modules():
        assert "pickle" not in path.read_text()
