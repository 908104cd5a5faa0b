"""The mathematics as functions: numbers in, numbers out, no torch.

Learning rates: `step_sizes` (one block, one point), `stability` (edge of stability), `generalized` ((L0, L1)-smoothness),
`finite_scale` (from forward passes alone), `recommend` (all of them to one rate a block).
Estimators: `moments`, `moments_subspace` (structured directions), `moments_error` (finite mu, minibatches, rounding).
Convergence: `one_step` (exact identities), `convergence` (our theorems), `references` (others'), `cost` (memory and passes).
Ground truth: `problems`, `problems_regression`, `simulate` (all seeds at once), `cases` (the slack of every bound).
`checks` is the record of a claim that was held to account.
"""
