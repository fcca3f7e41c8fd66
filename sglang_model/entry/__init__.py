"""What SGLang's model registry imports (``SGLANG_EXTERNAL_MODEL_PACKAGE``): one class, whatever happens."""
