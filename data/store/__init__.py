"""The store: artifacts as Parquet rows or folders of files, named by a hash of what decides their content."""

from cpo_pipe.data.store.artifact import Artifact, ArtifactWriter
from cpo_pipe.data.store.rows import Rows, ShardWriter
from cpo_pipe.data.store.store import Store

__all__ = ["Artifact", "ArtifactWriter", "Rows", "ShardWriter", "Store"]
