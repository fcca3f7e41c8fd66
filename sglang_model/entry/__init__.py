"""What SGLang's model registry imports (``SGLANG_EXTERNAL_MODEL_PACKAGE``): one module with one class, whatever happens."""
