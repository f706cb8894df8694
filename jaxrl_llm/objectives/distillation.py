"""Distillation from exact statistics of each context: the student pi towards a reference at fixed contexts.

The contexts are those of the given tokens. On contexts of the student this is on-policy distillation, the dense part of
`hybrid` alone: how the student changes which contexts it visits is not in the gradient. On contexts of the reference,
the forward KL has the gradient of the likelihood of its tokens, without their noise.
"""

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from jaxrl_llm.checks import checked
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.typing import SumCount


@checked
def forward_kl(kl_from_ref_t: Float[Array, "B R"], response_mask: Bool[Array, "B R"]) -> SumCount:
    """sum over response tokens of KL(ref(.|c_t) || pi(.|c_t)), and their number.

    Its gradient in the logits of a context is p - p_ref: it covers everything that the reference does, and is never
    small where the student misses some of it.
    Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.

    Args:
        kl_from_ref_t: exact KL(ref || pi) of each context [nats], with its gradient (`kl_reverse` of
            `token_statistics` with the reference as its reference).
        response_mask: true at the tokens whose contexts count.

    Returns:
        (sum [nats], number of tokens); add those of micro-batches and shards, then divide.
    """
    return masked_sum_count(kl_from_ref_t, response_mask)


@checked
def reverse_kl(kl_ref_t: Float[Array, "B R"], response_mask: Bool[Array, "B R"]) -> SumCount:
    """sum over response tokens of KL(pi(.|c_t) || ref(.|c_t)), and their number.

    Its gradient in the logits of a context is p (l - KL), l = log p - log p_ref: it leaves alone what the student does
    not do, and vanishes also where the student is certain of one token, right or wrong.
    Source: MiniLLM (Gu et al. 2023, arXiv 2306.08543) and GKD (Agarwal et al. 2023, arXiv 2306.13649), token by token.

    Args:
        kl_ref_t: exact KL(pi || ref) of each context [nats], with its gradient (`kl` of `token_statistics`).
        response_mask: true at the tokens whose contexts count.

    Returns:
        (sum [nats], number of tokens); add those of micro-batches and shards, then divide.
    """
    return masked_sum_count(kl_ref_t, response_mask)
