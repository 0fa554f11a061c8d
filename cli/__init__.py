"""The command `minimind-v`: captions, chats, and the other tools under one roof."""
