"""The store: artifacts as Parquet rows or folders of files, named by the hash of their spec."""

from cpo_pipe.data.store.artifact import Artifact, ArtifactWriter
from cpo_pipe.data.store.rows import Rows, ShardWriter
from cpo_pipe.data.store.store import Store

__all__ = ["Artifact", "ArtifactWriter", "Rows", "ShardWriter", "Store"]
