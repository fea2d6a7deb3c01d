import pytest

from modules import quantize
from tests.modules.architectures import dense_model


@pytest.fixture(params=["dense", "nf4"])
def base(request):
    """A small Llama, dense and packed."""
    model = dense_model("llama")
    if request.param == "nf4":
        quantize(model)
    return model
