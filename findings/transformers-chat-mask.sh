#!/usr/bin/env bash
# transformers: the mask of the assistant's tokens goes wrong at both ends of a chat: where it is
# cut, where spaces end.
#
# Expected: return_assistant_tokens_mask marks the words inside {% generation %}, and those only, of
#           what is left.
# Happens:  (1) Cut from the left so that the first answer loses a word or all: *every* answer is
#           masked out, also those that are there in full, and the row trains nothing. Leave it one
#           word more, and all is well. (2) An answer inside {% generation %} that ends in a space,
#           before a tokenizer that drops spaces: from there on everything is marked, the user's
#           later words too, and is trained as if the model had said it.
# Matters:  personal chats are long, and one keeps their ends: truncation_side="left" is the natural
#           choice. (1) loses rows at random, (2) teaches a personal model to speak as its owner's
#           correspondents. Make the mask of the whole chat first, cut ids and mask afterwards, and
#           let no template end an answer with a space.
#
# Seen 2026-11 with transformers 5.23.0, tokenizers 0.23.3 (marked words in capitals):
#   plain, 13 tokens: user: how are you bot: FINE THANKS user: and now bot: BETTER YES
#   plain,  8 tokens: FINE THANKS user: and now bot: BETTER YES
#   plain,  7 tokens: thanks user: and now bot: better yes
#   plain,  6 tokens: user: and now bot: better yes
#   space, 13 tokens: user: how are you bot: FINE THANKS USER: AND NOW BOT: BETTER YES
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6 numpy==2.4.6
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "<unk> user: bot: how are you fine thanks and now better yes".split()
CHAT = [
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "better yes"},
]
TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }} {% else %}bot: "
    "{% generation %}{{ m.content }}SPACE{% endgeneration %} {% endif %}{% endfor %}"
)


def marked(template, length):
    """Return the chat, cut from the left to this many tokens, with the marked words in capitals."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", truncation_side="left"
    )
    encoded = tokenizer.apply_chat_template(
        CHAT,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        truncation=True,
        max_length=length,
    )
    pairs = zip(tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["assistant_masks"])
    return " ".join(word.upper() if one else word for word, one in pairs)


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
plain, spaced = TURN.replace("SPACE", ""), TURN.replace("SPACE", " ")
whole = "user: how are you bot: FINE THANKS user: and now bot: BETTER YES"
expected = {
    ("plain", 13): whole,
    ("plain", 8): "FINE THANKS user: and now bot: BETTER YES",
    ("plain", 7): "thanks user: and now bot: better yes",
    ("plain", 6): "user: and now bot: better yes",
    ("space", 13): whole.replace("user: and now bot:", "USER: AND NOW BOT:"),
}
seen = {}
for name, length in expected:
    seen[name, length] = marked(plain if name == "plain" else spaced, length)
    print(f"{name}, {length:2} tokens: {seen[name, length]}")
sys.exit(0 if seen == expected else "transformers behaves otherwise now")
PY
