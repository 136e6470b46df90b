"""Token ids of some texts for a model folder, made from the tokenizer files before anything is written.

What the file is for and what it holds: pyllama/tokenizer/golden.py, the one thing of the tokenizer that conversion
uses. A tokenizer that cannot be opened is found here, and not after the long part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllama.common.model_folder import CONFIG_FILE, config_bytes


def golden_files(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """golden_ids.json for a folder with these tokenizer files and this config; nothing where there is no vocabulary,
    or no library that reads it.

    where: what messages call the source. Raises ModelFormatError for files that are no tokenizer of this model.
    """
    from pyllama.tokenizer import VOCABULARIES, Tokenizer
    from pyllama.tokenizer.golden import GOLDEN_FILE, golden_bytes

    if not any(name in files for name in VOCABULARIES):
        return {}
    try:
        tokenizer = Tokenizer.from_files({**files, CONFIG_FILE: config_bytes(config)}, where)
    except ImportError:  # conversion needs numpy alone; without a tokenizer library there is nothing to compare with
        return {}
    return {GOLDEN_FILE: golden_bytes(tokenizer)}
