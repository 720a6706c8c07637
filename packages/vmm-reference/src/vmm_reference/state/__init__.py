"""State as files: the one written form, snapshots, and what is built of them.

- `format`: every state as text, and the one reader.
- `folder`: a snapshot's files, written so that no half one can be read.
- `memory`: guest memory as a sparse file.
- `snapshot`: a machine to a folder and back.
"""
