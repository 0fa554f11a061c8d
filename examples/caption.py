"""Captions pictures with the embedded model: python examples/caption.py examples/images"""

import argparse

from transformers import pipeline

from minimind_v import EMBEDDED_MODEL
from minimind_v.inference.captioning import find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, folders of them, patterns, or URLs")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder or Hub repository")
    parser.add_argument("--prompt", default="Describe this image.", help="for example 这是什么？")
    arguments = parser.parse_args()

    captioner = pipeline("image-to-text", model=arguments.model)
    for image in find_images(arguments.images):
        print(f"{image}: {captioner(image, prompt=arguments.prompt)[0]['generated_text']}")


if __name__ == "__main__":
    main()
