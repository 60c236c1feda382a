#!/usr/bin/env bash
# rouge-score: two equal texts score 0, and two different ones 1, where letters are not a to z.
#
# Expected: ROUGE-L of a text with itself is 1, whatever its language; "été" and "âtâ" are different
#           words; a score that cannot be computed is an error.
# Happens:  the default tokenizer of RougeScorer replaces whatever is not a-z or 0-9 by a space.
#           Russian, Greek, Chinese or Arabic texts have no words at all: every score is 0, also of
#           equal texts. In French or German a letter with a mark cuts its word in two, so different
#           words become the same pieces.
# Matters:  personal models are in the languages of their people. lm-evaluation-harness and many
#           papers take this package, and a mean over languages hides that some count for nothing.
#           Give RougeScorer a tokenizer of words of any script (tokenizer=, re.findall(r"\w+")),
#           and compare only scores that were made with the same one.
#
# Seen 2026-11 with rouge-score 0.1.2, ROUGE-L F1:
#                                  default   words of any script
#   привет мир / привет мир         0.000     1.000
#   καλημέρα κόσμε / the same       0.000     1.000
#   你好 世界 / 你好 世界             0.000     1.000
#   été là / âtâ lù                 1.000     0.000
#   the cat / the cat               1.000     1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check rouge-score==0.1.2
cd "$folder"
timeout 120 venv/bin/python - <<'PY'
import re
import sys
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer


class Words:
    """Words of any script."""

    def tokenize(self, text):
        return re.findall(r"\w+", text.lower())


PAIRS = [
    ("привет мир", "привет мир", 0, 1),
    ("καλημέρα κόσμε", "καλημέρα κόσμε", 0, 1),
    ("你好 世界", "你好 世界", 0, 1),
    ("été là", "âtâ lù", 1, 0),
    ("the cat", "the cat", 1, 1),
]
print("rouge-score", version("rouge-score"))
default, words = RougeScorer(["rougeL"]), RougeScorer(["rougeL"], tokenizer=Words())
as_expected = True
for one, other, by_default, by_words in PAIRS:
    scores = [s.score(one, other)["rougeL"].fmeasure for s in (default, words)]
    print(f"{one} / {other}: default {scores[0]:.3f}, words of any script {scores[1]:.3f}")
    as_expected = as_expected and scores == [by_default, by_words]
sys.exit(0 if as_expected else "rouge-score behaves otherwise now")
PY
