"""The mathematics as functions: numbers in, numbers out, no torch.

`step_sizes` and `finite_scale` give learning rates, `moments` the estimators' moments, `convergence` the bounds, `cost`
the memory and time formulas, `problems` functions whose constants are known, `checks` the record of a claim that was
held to account.
"""
