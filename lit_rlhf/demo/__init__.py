"""The built-in demonstration: all four stages on a small world of stories that the demo makes itself.

The world is a grammar of short stories (``grammar``), so that a parser can say whether a text is well-formed
(``reader``) and a gold judge that no stage is ever trained on can say how good it is (``judge``). Everything else goes
through the same files, DataModules and stages that users use: the demo writes JSON lines and Hugging Face folders into
a run folder and trains on those.
"""
