from jaxrl_llm.rollouts.constrained.generate import GenerateConstrained as GenerateConstrained
from jaxrl_llm.rollouts.constrained.generate import make_constrained_generate as make_constrained_generate
from jaxrl_llm.rollouts.constrained.grammars import Grammar as Grammar
from jaxrl_llm.rollouts.constrained.scoring import allowed_log_probs as allowed_log_probs
from jaxrl_llm.rollouts.constrained.scoring import score_constrained as score_constrained
from jaxrl_llm.rollouts.constrained.scoring import unpack_mask as unpack_mask
from jaxrl_llm.rollouts.constrained.token_masks import GrammarRows as GrammarRows
from jaxrl_llm.rollouts.constrained.token_masks import TokenMasker as TokenMasker
