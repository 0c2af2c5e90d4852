"""The same shape in other people's code, on the same machine and batch. Needs requirements-peers.txt."""
import importlib.util
import sys

import numpy as np

from modse_jax.config import Config


def mixtral(config: Config, batch: dict) -> dict:
    """{name: a training step} of Hugging Face's Mixtral with AdamW, fp32, under two implementations of its experts."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"--peers needs {package}: pip install -r requirements-peers.txt")
    return {f"mixtral {experts}": _step(config, batch, experts) for experts in ("grouped_mm", "eager")}


def _step(config, batch, experts):
    import torch
    import transformers
    torch.manual_seed(0)
    m = config.model
    shape = transformers.MixtralConfig(
        vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=config.moe.width, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads or m.num_heads,
        num_local_experts=config.moe.num_experts, num_experts_per_tok=config.moe.top_k,
        router_aux_loss_coef=config.moe.balance_loss_weight, output_router_logits=True, use_cache=False)
    model = transformers.MixtralForCausalLM(shape)
    model.set_experts_implementation(experts)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate,
                                  weight_decay=config.optimizer.weight_decay)
    tokens = torch.tensor(np.asarray(batch["tokens"])[:, :-1], dtype=torch.long)
    targets = torch.tensor(np.asarray(batch["tokens"])[:, 1:], dtype=torch.long)

    def step():
        out = model(input_ids=tokens)
        logits = out.logits.reshape(-1, m.vocab_size)
        loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
        loss = loss + out.aux_loss * config.moe.balance_loss_weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
