"""These chat templates have names: what `base.chat_template` may say instead of a template."""

from __future__ import annotations

TEMPLATES = {
    # For bases that know <|im_start|> and <|im_end|>, as Qwen's, whose own template writes an empty
    # thought into the last answer alone, so that no chat of several turns can be read by it.
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # For any base: the roles in words, and the end of a text behind each answer.
    "plain": (
        "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}"
        "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
