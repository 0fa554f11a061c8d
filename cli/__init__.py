"""The command `minimind-v`: describe pictures, talk about them, train, convert and publish."""
