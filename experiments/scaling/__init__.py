"""Scaling laws: how a loss falls with parameters N and tokens D, and what that says of a budget of compute.

data          runs from a CSV; what cannot be fitted is refused by name
law           the form L(N, D) = E + A / N^alpha + B / D^beta, and what a run costs
varpro        fits by variable projection;  huber: by a robust loss on log-losses
overtraining  the form with one exponent, for runs far beyond the optimum
profiles      isoFLOP parabolas (approach 2) and their bias;  envelope: fixed sizes (approach 1)
doubt         bootstrap intervals, sensitivity, prediction of the largest runs
published     exponents of others
study         all of these for one set of runs;  report and figures: what people see;  cli: `zoo fit`
"""
