"""The persistent server: OpenAI's HTTP interface over an asynchronous engine or several of them."""
