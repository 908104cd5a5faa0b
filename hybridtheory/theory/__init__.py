"""The mathematics as functions: numbers in, numbers out, no torch.

Learning rates: `step_sizes` (one block, one point), `stability` (edge of stability), `generalized` ((L0, L1)-smoothness),
`finite_scale` (from forward passes alone), `recommend` (all of them to one rate a block).
Estimators: `moments`, `moments_subspace` and `moments_covariance` (structured directions), `moments_error` (finite mu, minibatches,
rounding).
Convergence: `one_step` (exact identities), `descent` (one step measured), `convergence` (our theorems), `references` (others'), `held`
(theorems held to a measured run), `cost` (memory and passes).
Ground truth: `problems`, `problems_regression`, `simulate` (all seeds at once), `cases` (the slack of every bound).
`checks` is the record of a claim that was held to account.

Rules, moments and theorems refuse numbers outside their statements (negative, infinite, NaN, a count that is none) with a `UserError` that
names the number; a theorem whose hypotheses fail raises `checks.OutsideTheorem`, which carries them.
"""
