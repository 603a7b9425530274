"""Packed shards: tar files, their index, and reading any field of any sample."""

from lockstep.data.packed.dataset import ShardDataset
from lockstep.data.packed.index import Entry, ShardFile, ShardIndex
from lockstep.data.packed.index_file import IndexFile, encode_index
from lockstep.data.packed.local_copy import copy_folder, start_copying
from lockstep.data.packed.pixels import decode_pixels, encode_pixels, explain
from lockstep.data.packed.reader import ShardReader
from lockstep.data.packed.scan import (
    INDEX_FILE,
    MANIFEST_FILE,
    WORK_FOLDER,
    find_index,
    index_shards,
    is_current,
    list_shards,
    locked,
)
