"""The command `bigmac draw`: lets the generator of a trained model draw pictures."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bigmac_lightning.commands.answer import answer, parser_of


def draw(
    run: str,
    message: str,
    output: str,
    images: Sequence[str] = (),
    number: int = 1,
    seed: int = 0,
    device: str | None = None,
) -> list[str]:
    """Write pictures that a generator draws.

    Args:
        run: Folder of a run, or a checkpoint of it.
        message: What is to be drawn, as training has said it.
        output: File to write, such as x.png. Of several pictures, x-0.png, x-1.png and so on.
        images: Files for the placeholders <image> of the message, or before it.
        number: Number of pictures.
        seed: Of the noise of the first picture; the others have the seeds after it.
        device: Such as cuda:0; by default a GPU, if there is one.

    Returns: the files that were written.

    Raises:
        ValueError, FileNotFoundError: there is no such run, it has no generator, or the message is no prompt for it.
    """
    from bigmac_lightning.loaded_run import load

    path = Path(output)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {output}")
    pictures = load(run, device=device).draw(message, images, seed, number)
    written = list[str]()
    for k, picture in enumerate(pictures):
        place = path if number == 1 else path.with_stem(f"{path.stem}-{k}")
        picture.save(place)
        written.append(str(place))
    return written


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    files = {"images": "files for the placeholders <image> of the message, or before it"}
    parser = parser_of("draw", "Let a trained model draw.", draw, positional=True, files=files)

    def run() -> None:
        for place in draw(**vars(parser.parse_args(list(argv)))):
            Console().print(place, highlight=False, soft_wrap=True)

    return answer("draw", run)
