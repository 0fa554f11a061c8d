"""The load-balancing loss of MiniMind's mixture of experts, without which all tokens would go to the same expert."""

from typing import Any

import torch

from .configuration_minimind_v import MiniMindConfig


def number_rows(
    shape: torch.Size, attention_mask: Any = None, position_ids: torch.LongTensor | None = None
) -> torch.LongTensor:
    """Which row each token of a batch `[B, T]` belongs to, `[B * T]`; -1 for padding.

    Rows that are packed into one count as rows of their own: each begins where `position_ids` are 0.
    """
    rows = torch.arange(shape[0], device=None if position_ids is None else position_ids.device)[:, None].expand(shape)
    if attention_mask is not None:
        is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if is_padding_mask:
            rows = rows.to(attention_mask.device).masked_fill(attention_mask[:, -shape[1] :] == 0, -1)
    elif position_ids is not None:
        begins = position_ids.expand(shape) == 0
        begins = torch.cat([torch.ones_like(begins[:, :1]), begins[:, 1:]], dim=1)
        rows = begins.flatten().cumsum(0).view(shape) - 1
    return rows.flatten()


def router_auxiliary_loss(
    router_logits: tuple[torch.Tensor, ...], config: MiniMindConfig, rows: torch.LongTensor
) -> torch.Tensor:
    """Load-balancing loss of a mixture of experts, from one tensor of logits `[B * T, E]` per layer with experts.

    It is the sum over the layers of E * sum_e f_e P_e, where E is the number of experts, f_e how often a token chose
    expert e, divided by the number of tokens, and P_e its mean probability:
    - `"switch"`: over the whole batch (MiniMind-3; Switch Transformer, arXiv:2101.03961, equation 4);
    - `"batch"`: the same divided by `num_experts_per_tok` (MiniMind2 with `seq_aux=False`);
    - `"sequence"`: as `"batch"`, but the mean over the rows (MiniMind2; DeepSeek-V2, arXiv:2405.04434, equation 12).

    Args:
        router_logits: Of each layer.
        config: Of the decoder.
        rows: See [`number_rows`]. Padding does not count, unlike in the original, which has no attention mask: without
            a mask, the numbers are the original's.
    """
    counted = (rows >= 0).float()
    groups = rows.clamp(min=0) if config.router_aux_loss_type == "sequence" else torch.zeros_like(rows)
    sizes = torch.zeros_like(counted).index_add(0, groups, counted)  # of as many groups as there could be
    shares = (counted / sizes[groups].clamp(min=1))[:, None]  # of a token in the mean of its group
    loss = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(config.num_experts_per_tok, dim=-1).indices
        choices = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        to = {"device": logits.device}
        f, p = (
            torch.zeros_like(values).index_add(0, groups.to(**to), values * shares.to(**to))
            for values in (choices, probabilities)
        )
        products = (f * p).sum() / (sizes > 0).sum().to(**to)
        loss = loss + config.num_experts * products.to(loss.device)
    return loss if config.router_aux_loss_type == "switch" else loss / config.num_experts_per_tok


__all__ = ["number_rows", "router_auxiliary_loss"]
