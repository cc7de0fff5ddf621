"""This package inside other tools: any subclass of transformers' `Trainer`, and axolotl."""
