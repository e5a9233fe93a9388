"""One row per task: a small config and a solver, which `tests/test_tasks.py` runs.

    ROWS[name] = (config, solve)    solve(batch without "targets", config) -> array of the shape of "targets"

A solver answers from the input alone, by the definition of the task and in other ways than the generator;
what it says where the target is ignored does not count. Rows are small: few different targets, because chance
is measured on a few thousand examples, and fresh examples (`train_examples=0`) where the config has a pool,
unless the pool is what the row is about.

    GOLDEN[name] = sha256 of one training batch and one test batch; the test that fails without it prints it.
"""

from dataclasses import replace

from solvers_needle import solve_needle
from solvers_structured import (
    solve_list_ops,
    solve_mad_compression,
    solve_mad_copying,
    solve_mad_fuzzy_recall,
    solve_mad_memorization,
    solve_mad_recall,
    solve_pathfinder,
)
from solvers_symbolic import (
    solve_arithmetic,
    solve_copying,
    solve_induction,
    solve_recall,
    solve_recall_mixture,
    solve_varied_recall,
    solve_word_problem,
)

from experiments.tasks.copying import CopyingData
from experiments.tasks.expressions import ArithmeticData
from experiments.tasks.induction import InductionData
from experiments.tasks.list_ops import ListOpsData
from experiments.tasks.mad_fuzzy import MadFuzzyRecallData
from experiments.tasks.mad_memory import MadCompressionData, MadCopyingData, MadMemorizationData
from experiments.tasks.mad_recall import MadRecallData
from experiments.tasks.needle import FORMS, NeedleData
from experiments.tasks.pathfinder import PathfinderData
from experiments.tasks.recall import RecallData
from experiments.tasks.recall_mixture import RecallMixture
from experiments.tasks.recall_variants import VariedRecall
from experiments.tasks.state_tracking import WordProblemData

ROWS = {
    "recall": (RecallData(vocab_size=34, length=32, pairs=4, train_examples=0), solve_recall),
    "recall-filler": (
        RecallData(vocab_size=34, length=32, pairs=4, train_examples=300, random_filler=True),
        solve_recall,
    ),
    "recall-mixture": (
        RecallMixture(
            vocab_size=36,
            train=((16, 2, 60), (16, 4, 40), (32, 4, 90)),
            evaluation=((16, 4, 20), (32, 8, 30)),
            fresh=True,
        ),
        solve_recall_mixture,
    ),
    "recall-mixture-pool": (
        RecallMixture(vocab_size=40, train=((16, 3, 4_000), (24, 3, 4_000)), evaluation=((32, 3, 20),)),
        solve_recall_mixture,
    ),
    "recall-rewritten": (
        VariedRecall(vocab_size=40, length=40, pairs=6, rewritten=4, train_examples=0),
        solve_varied_recall,
    ),
    "recall-compound": (
        VariedRecall(
            vocab_size=36, length=60, pairs=9, compound=True, train_examples=300, random_filler=True
        ),
        solve_varied_recall,
    ),
    "recall-repeated": (
        VariedRecall(vocab_size=48, length=48, pairs=4, rewritten=2, passes=2, train_examples=0),
        solve_varied_recall,
    ),
    "induction": (InductionData(length=40, eval_examples=200), solve_induction),
    "induction-short": (
        InductionData(vocab_size=6, length=12, train_examples=500, eval_examples=200),
        solve_induction,
    ),
    "copying": (CopyingData(vocab_size=8, context=30, copied=5, eval_examples=200), solve_copying),
    "copying-plain": (CopyingData(context=24, copied=8, selective=False, eval_examples=200), solve_copying),
    "parity": (replace(WordProblemData.parity(), eval_examples=200), solve_word_problem),
    "parity-long": (replace(WordProblemData.parity(40, 256), eval_examples=100), solve_word_problem),
    "word-problem-z5": (
        WordProblemData(group="Z5", length=20, train_examples=800, eval_examples=200),
        solve_word_problem,
    ),
    "word-problem-s3": (WordProblemData(group="S3", length=24, eval_examples=200), solve_word_problem),
    "word-problem-a5": (
        WordProblemData(group="A5", min_length=8, length=12, eval_examples=200),
        solve_word_problem,
    ),
    "word-problem-s5": (
        WordProblemData(group="S5", min_length=16, length=16, eval_examples=200),
        solve_word_problem,
    ),
    "word-problem-swaps": (
        WordProblemData(group="S5", moved=2, length=10, eval_examples=200),
        solve_word_problem,
    ),
    "word-problem-swaps-last": (
        WordProblemData(group="S4", moved=2, min_length=4, length=20, labels="last", eval_examples=200),
        solve_word_problem,
    ),
    "arithmetic": (ArithmeticData(eval_examples=200), solve_arithmetic),
    "arithmetic-sums": (
        ArithmeticData(modulus=3, operators="-+", min_length=5, length=31, eval_examples=200),
        solve_arithmetic,
    ),
    "arithmetic-brackets": (ArithmeticData(brackets=True, eval_examples=200), solve_arithmetic),
    "arithmetic-brackets-long": (
        ArithmeticData(modulus=3, operators="*-", brackets=True, min_length=40, length=90, eval_examples=50),
        solve_arithmetic,
    ),
    "mad-recall": (MadRecallData(length=32, train_examples=0, eval_examples=100), solve_mad_recall),
    "mad-recall-noise": (
        MadRecallData(
            vocab_size=14, noise_vocab=6, noise=0.8, length=40, train_examples=300, eval_examples=100
        ),
        solve_mad_recall,
    ),
    "mad-recall-fuzzy": (
        MadFuzzyRecallData(vocab_size=12, length=64, train_examples=0, eval_examples=100),
        solve_mad_fuzzy_recall,
    ),
    "mad-memorization": (
        MadMemorizationData(vocab_size=34, train_examples=40, eval_examples=100),
        solve_mad_memorization,
    ),
    "mad-compression": (
        MadCompressionData(vocab_size=12, noise_vocab=4, noise=0.3, train_examples=0, eval_examples=100),
        solve_mad_compression,
    ),
    "mad-copying": (
        MadCopyingData(vocab_size=10, length=40, copied=6, train_examples=0, eval_examples=100),
        solve_mad_copying,
    ),
    "list-ops": (
        ListOpsData(length=60, shortest=12, depth=5, arguments=5, eval_examples=100),
        solve_list_ops,
    ),
    "pathfinder": (
        PathfinderData(size=20, dashes=3, distractors=1, distractor_dashes=2, eval_examples=60),
        solve_pathfinder,
    ),
}

for _kind in FORMS:
    _length = 420 if _kind == "niah3" else 300
    ROWS[f"needle-{_kind}"] = (NeedleData(kind=_kind, length=_length, eval_examples=100), solve_needle)

GOLDEN = {
    "needle-passkey": "deb4999659d210234fed21310b1e734f12c9b83ea46f4bcd358f2c3d352ea8c5",
    "needle-passkey5": "d6ba36c2c1c7d7ffd2beeab08270b5d216fd9fd3af338412071593c0c5b2c556",
    "needle-niah1": "020b974cedfe5036e9b6f7afa93c4be0d046a54ccd7377ac748eb85680891a47",
    "needle-niah2": "6d8c025b43094ce4e0738e9c54c7aedd529fc137e4147620e4dc7360124a4ade",
    "needle-niah3": "41465c88de304fc680c5da5e53089a2616bd681c575a0dbe922a61be1842a81a",
    "recall": "9a95a7775b539df9087085ebf6097f80d842d96ea64e419bf99c43482cf0cc96",
    "recall-filler": "7d6604275acdbc1360f69ecae652b40c35529ba0e64371c2f50d89fa73e6c447",
    "recall-mixture": "cc0bf342b20537644a7309a9b2a4e45c9cc96f3dc8ad5e78166231f6da2c75bf",
    "recall-mixture-pool": "9c2925d623948357519cb654764c8ecf9c1503cb1ae47485ce80785aefa163bd",
    "recall-rewritten": "f9f414b30e41ceb9ab87c7098ddcfe832e805eddd1c550a9692e530ba7bf5b1e",
    "recall-compound": "d5b268ba49c10bb318e3b0819002fcdfa20236398164a495cd35b7ed0e3fac1e",
    "recall-repeated": "41c03ad7d81dcb363747fa3bfa4e130fa0c025422f61ba1d72d095b1fd013e2c",
    "induction": "505213171fc9323a4d6e52796fc9624ac853bb6b5afd023deaf65e3a4e1eefd2",
    "induction-short": "c8e6be2dec1fe486e2f64384c0db5ee519212294a74979d3af7de3f7815f306a",
    "copying": "1e2dcc463e7da94b24beff1479b4811fdd6715ca4b507f2bf9fc35aa54c321c1",
    "copying-plain": "fdb62e6dbffad0dcc57dd936cc799a1fdb18afce181f010615dce857db5b4281",
    "parity": "afcd39621320fa0c56b6d7bd29f694160b869458c01c7f84fec6d1983b5af80f",
    "parity-long": "890c10aae479e11745d81ef7399bcf93e47358c82a6b9a35d93cf047cf56b43c",
    "word-problem-z5": "e12c4798365f945fbcc82890798098266274d73f6e91f7152869725318f0956e",
    "word-problem-s3": "9538fc07af7f722ece0517b81aefa7b62b7d973a125726804166a05b4d1fc513",
    "word-problem-a5": "8124b6304365df73083f5078e650271e8d90001b1727ce44dfd1d9b1c6ec07b7",
    "word-problem-s5": "91a672d1c03880db5aab7d783025df817cb5ada8632339d104654d46bbbe7c2b",
    "word-problem-swaps": "0d0d846e86a4df5762d3879c499cc4d5945c0b9727c9a966bb8b313fded5501a",
    "word-problem-swaps-last": "39e457021852f7b024fbae1a2c2e2ccd94b3c6817b72c4b5821d148a391d5615",
    "arithmetic": "f1af98b8b570fd20a0049590700eb0eff3f8cb739274b66b1ddab9b7e3647765",
    "arithmetic-sums": "d8aed42d7b4af84e756cc3c81b8c092e6bf04d8108b315e6c56d78abaf141833",
    "arithmetic-brackets": "c1b6dc2d33988732e3122b5b28a7691c72e34d1d5124b9725dd431736a41717f",
    "arithmetic-brackets-long": "5a658d53020707e21dd6dbe61918572651d0d18f579cc4923bc7361ff87bf3e4",
    "mad-recall": "497a98c56e053aeac9c6135b2ffc0295ef2f970a37c4f601a99c0ef6685f7630",
    "mad-recall-noise": "3b5fbb71e1c3690eb951b10255820813035ff811f73e4950476a6d8f5c9aebb3",
    "mad-recall-fuzzy": "1d9ac6773584947eac587ad59ca22bc40d59d10e730898868a27e2983e8940cb",
    "mad-memorization": "4adbbdc775a9d732e42bbb1428dbd327fd772f8ce33527a4598e1904da961ae2",
    "mad-compression": "484ee987cb6336d632a476030d32cacd2e3882740456b6af0acc9e90dd6d1204",
    "mad-copying": "7840912561a94776dd0188b5964e7e4f31e8db0cd9d5b39e4419e399adae0ebc",
    "list-ops": "a1f0a31be18d9dd9fae9908158b51ef5a3e1f283f507054df29db4bd2572004c",
    "pathfinder": "d15570201459404e993ac3e1802d0fabfc44fee9ef711249bf9c7457eb2f6db7",
}
