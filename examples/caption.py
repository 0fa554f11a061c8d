"""Captions pictures with the embedded model: python examples/caption.py examples/images"""

import argparse
import sys

from transformers import pipeline

from minimind_v import EMBEDDED_MODEL
from minimind_v.inference.captioning import find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, folders of them, patterns, or URLs")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder or Hub repository")
    parser.add_argument("--prompt", default="Describe this image.", help="for example 这是什么？")
    arguments = parser.parse_args()

    captioner, broken = pipeline("image-to-text", model=arguments.model), 0
    for image in find_images(arguments.images):
        try:
            caption = captioner(image, prompt=arguments.prompt)[0]["generated_text"]
        except (OSError, ValueError) as error:  # not a picture: the others go on
            print(f"error: {error}", file=sys.stderr)
            broken += 1
        else:
            print(f"{image}: {caption}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
