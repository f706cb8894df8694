"""The likelihood of what was written: imitation of demonstrations, or of one's own best answers."""

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from jaxrl_llm.checks import checked
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.typing import SumCount


@checked
def negative_log_likelihood(log_prob: Float[Array, "B R"], response_mask: Bool[Array, "B R"]) -> SumCount:
    """-sum over response tokens of log pi(y_t|c_t), and their number: the quotient is the mean over tokens.

    Its gradient in the logits of a context is p - e_a. Every token weighs the same, so a long row weighs more; divide
    each row by its length first where rows should weigh the same.

    Args:
        log_prob: of the tokens under the trained policy [nats], with its gradient.
        response_mask: true at the tokens to be learned.

    Returns:
        (sum [nats], number of tokens); add those of micro-batches and shards, then divide.
    """
    return masked_sum_count(-log_prob, response_mask)
