"""The parts of `glm_claims`: one file for each claim of GLM-4.5 or group of them, and what they share."""
