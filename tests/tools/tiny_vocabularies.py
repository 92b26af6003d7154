"""Small vocabularies that really tokenise, in the two forms that GGUF files carry: byte-level BPE and SPM."""

import json
from dataclasses import dataclass, field

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

#: What the merges are learnt from. Any English does; it is fixed so that the vocabulary is.
_SAMPLE = (
    "The rain had stopped before the morning, and the old road to the harbour was bright with pools of "
    "water. There were three boats in the harbour and no one on any of them. She walked along the wall, "
    "counting the stones as she had done when she was a child, and thought of the letter that had not been "
    "answered. It was not that she wanted the house; it was that nobody else would look after the garden, "
    "and the bees, and the other things that had been left there. 'I don't know,' he'd said, 'what will "
    "become of it in ten years.'"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with all that GGUF stores about them. ``scores`` only for SPM, ``merges`` only for BPE."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_space_prefix: bool | None = None
    chat_template: str | None = None

    def write(self, writer: GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys that llama.cpp's converter writes."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def bpe_vocabulary(pre: str, *, add_bos: bool = False) -> Vocabulary:
    """256 bytes, 40 merges and three control tokens: 299, which no tile of rows divides."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=296, initial_alphabet=alphabet, show_progress=False)
    tokens, merges = _learn(learner, trainer)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    first = len(tokens)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=(*tokens, *control),
        types=(TokenType.NORMAL,) * first + (TokenType.CONTROL,) * 3,
        merges=tuple(" ".join(pair) for pair in merges),
        special={"bos": first + 1, "eos": first + 2, "padding": first},
        add_bos=add_bos,
        chat_template=CHATML,
    )


def spm_vocabulary(*, gemma: bool) -> Vocabulary:
    """Control tokens, 256 byte tokens, the sample's characters and 40 merged pieces scored by their rank.

    ``gemma``: its order of control tokens, and no space in front of a text.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    characters = len(set(_SAMPLE))
    trainer = trainers.BpeTrainer(vocab_size=characters + 40, show_progress=False)
    pieces, merges = _learn(learner, trainer)
    rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
    control = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    types = [TokenType.UNKNOWN if token == "<unk>" else TokenType.CONTROL for token in control]
    tail = ["<start_of_turn>", "<end_of_turn>"] if gemma else []
    unmerged = len(merges)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=(*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *tail),
        types=(
            *types,
            *(TokenType.BYTE,) * 256,
            *(TokenType.NORMAL,) * len(pieces),
            *(TokenType.CONTROL,) * len(tail),
        ),
        scores=(
            *(-1000.0,) * (len(control) + 256),
            *(-float(rank.get(piece, unmerged)) for piece in pieces),
            *(-1000.0,) * len(tail),
        ),
        special=(
            {"bos": 2, "eos": 1, "unknown": 3, "padding": 0} if gemma else {"bos": 1, "eos": 2, "unknown": 0}
        ),
        add_bos=True,
        add_space_prefix=not gemma,
    )


def _learn(learner: Tokenizer, trainer: trainers.BpeTrainer) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens by id, and merges in order of rank."""
    learner.train_from_iterator([_SAMPLE], trainer)
    model = json.loads(learner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in model["merges"]]
