"""The HTTP side: routes as OpenAI has them under /v1, our own under /v1/jaxtune, the page at /. No JAX in here."""
