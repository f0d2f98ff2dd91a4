"""moeops as the experts of Hugging Face transformers' models. Importing this registers ``"moeops"``.

.. code-block:: python

    import moeops.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moeops")

``model.set_experts_implementation("moeops")`` does the same to a loaded model. docs/transformers.md says what is fused.
"""

from moeops.integrations.transformers._version import has_expert_parallel, require_transformers

require_transformers()

from moeops.integrations.transformers.experts import NAME, register
from moeops.integrations.transformers.explain import ExpertsReport, explain
from moeops.integrations.transformers.patches import patch

register()
if has_expert_parallel():
    from moeops.integrations.transformers import expert_parallel

    expert_parallel.register()

__all__ = ["NAME", "ExpertsReport", "explain", "patch", "register"]
