"""The command `bigmac chat`: asks a trained model something, once or line by line."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bigmac_lightning.commands.answer import answer, parser_of

HELP = (
    "A line is your next message; /image FILE, /video FILE, /audio FILE come before it; /new begins anew; end: ctrl-D"
)
KINDS = ("image", "video", "audio")


def chat(
    run: str,
    message: str | None = None,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    audios: Sequence[str] = (),
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Print what a trained model replies.

    Args:
        run: Folder of a run, or a checkpoint of it.
        message: What you say; without it, each line of the input is a message of one conversation.
        images, videos, audios: Files for the placeholders of the message, or before it.
        max_new_tokens: Tokens after which a reply is cut off; by default 256, or what the data say.
        temperature: What logits are divided by before a token is drawn; 0 takes the most likely token.
        top_p: Draw among the most likely tokens that together have this probability.
        seed: Of the draws.
        device: Such as cuda:0; by default a GPU, if there is one.

    Raises:
        ValueError, FileNotFoundError: there is no such run, or a message is no prompt for it.
    """
    from bigmac_lightning.loaded_run import load

    loaded = load(run, device=device)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    loaded.sampling(**sampling)  # wrong ones are refused before anything is said
    if message is not None:
        _say(loaded.stream(message, images, videos, audios, **sampling))
        return
    if sys.stdin.isatty():
        Console(stderr=True).print(HELP, style="dim", soft_wrap=True)
    turns = list[dict[str, Any]]()
    given = zip(KINDS, (images, videos, audios), strict=True)
    parts = [{"type": kind, "path": path} for kind, paths in given for path in paths]
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "/new":
            turns, parts = [], []
        elif word[1:] in KINDS and word.startswith("/"):
            parts.append({"type": word[1:], "path": rest.strip()})
        elif word.startswith("/"):
            print(f"bigmac chat: there is no {word}. {HELP}", file=sys.stderr)
        elif line.strip():
            content = [*parts, {"type": "text", "text": line.strip()}]
            asked = [*turns, {"role": "user", "content": content}]
            try:
                reply = _say(loaded.stream(asked, **sampling))
            except ValueError as error:  # a message that cannot be used does not end the conversation
                print(f"bigmac chat: {error}", file=sys.stderr)
                continue
            turns, parts = [*asked, {"role": "assistant", "content": reply}], []


def _say(pieces: Any) -> str:
    """Print the pieces of a reply, each as soon as it is known."""
    said = list[str]()
    for piece in pieces:
        said.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(said)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    files = {f"{kind}s": f"files for the placeholders <{kind}> of the message, or before it" for kind in KINDS}
    parser = parser_of("chat", "Ask a trained model something.", chat, positional=True, files=files)
    return answer("chat", lambda: chat(**vars(parser.parse_args(list(argv)))))
