"""The whole chain of GLM-4.5's post-training on two small tasks: the parts of `glm_hybrid_reasoner`."""
