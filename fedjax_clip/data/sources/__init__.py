"""Real data: digits by writer, pictures, text, local files, and anything that TFDS or Hugging Face's datasets know.

Large packages are imported only when they are needed, and nothing is downloaded without a request.
"""

from fedjax_clip.data.sources.archives import npz, save_npz
from fedjax_clip.data.sources.dialogue import chats, dialogues, packed
from fedjax_clip.data.sources.hugging_face import flwr, huggingface
from fedjax_clip.data.sources.pictures import FASHION_MNIST, digits, fashion_mnist, mnist
from fedjax_clip.data.sources.text import shakespeare, text_files, tweets
from fedjax_clip.data.sources.tfds_cache import tfds

__all__ = [
    "FASHION_MNIST",
    "chats",
    "dialogues",
    "digits",
    "fashion_mnist",
    "flwr",
    "huggingface",
    "mnist",
    "npz",
    "packed",
    "save_npz",
    "shakespeare",
    "text_files",
    "tfds",
    "tweets",
]
