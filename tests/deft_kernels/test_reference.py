"""The oracle itself: identities of the paper's equations, in float64."""

import pytest
import torch

from deft_kernels import reference


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("method", reference.DECOMPOSITIONS)
def test_factors_are_the_papers_equation(method):
    W, P, R = randn(9, 7), randn(9, 4), randn(4, 7)
    B, K = reference.decompose(P, method)
    expected = W - B @ K.T @ W + 0.7 * B @ R
    torch.testing.assert_close(reference.merged_weight(W, P, R, method, 0.7), expected)
    x, bias = randn(5, 7), randn(9)
    y = x @ expected.T + bias
    torch.testing.assert_close(reference.lowrank_linear(x, W, bias, *reference.factors(W, P, R, method, 0.7)), y)
    torch.testing.assert_close(reference.activation_linear(x, x @ W.T + bias, bias, B, K, 0.7 * R), y)


@pytest.mark.parametrize("method", ["qr", "svd"])
def test_orthogonal_projectors(method):
    B, K = reference.decompose(randn(9, 4), method)
    projector = B @ K.T
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64))


def test_unknown_decomposition():
    with pytest.raises(ValueError, match=r"'lu'.*qr, svd, relu, none"):
        reference.decompose(randn(4, 2), "lu")


def test_sequential_composition_is_one_after_the_other():
    W = randn(9, 7)
    adapters = [
        (randn(9, 3), randn(3, 7), "qr", 0.5),
        (randn(9, 2), None, "relu", 1.0),
        (randn(9, 4), randn(4, 7), "svd", 2.0),
    ]
    expected = W
    for P, R, method, scale in adapters:
        expected = reference.merged_weight(expected, P, R, method, scale)
    B, A = reference.compose_sequential(W, adapters)
    torch.testing.assert_close(W + B @ A, expected)


def test_joint_composition_equals_sequential_only_for_orthogonal_subspaces():
    W = randn(9, 7)
    Q = torch.linalg.qr(randn(9, 5)).Q
    for first, second, equal in [(Q[:, :3], Q[:, 3:], True), (randn(9, 3), randn(9, 2), False)]:
        B, A = reference.compose_joint(W, [first, second])
        Bs, As = reference.compose_sequential(W, [(first, None, "qr", 1.0), (second, None, "qr", 1.0)])
        assert torch.allclose(W + B @ A, W + Bs @ As) == equal
        torch.testing.assert_close(torch.cat([first, second], 1).T @ (W + B @ A), torch.zeros(5, 7, dtype=torch.float64))


def test_weighted_composition():
    W, weights = randn(9, 7), [0.3, -2.0]
    pairs = [reference.factors(W, randn(9, 3), randn(3, 7)), reference.factors(W, randn(9, 2), None)]
    B, A = reference.compose(pairs, weights)
    torch.testing.assert_close(B @ A, sum(w * b @ a for w, (b, a) in zip(weights, pairs)))


@pytest.mark.parametrize("shape", [(7, 3), (5, 5), (40, 1), (23, 16)])
def test_backward_of_qr_and_svd_by_hand_equals_autograd(shape):
    P, G = randn(*shape).requires_grad_(), randn(*shape)
    Q = torch.linalg.qr(P).Q
    (expected,) = torch.autograd.grad(Q, P, G)
    torch.testing.assert_close(reference.orthonormalize_backward([G], [Q.detach()], [P.detach()])[0], expected)
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    (expected,) = torch.autograd.grad(U, P, G)
    torch.testing.assert_close(reference.left_singular_backward(G, U.detach(), S.detach(), Vh.detach()), expected)


def test_convolution_is_one_with_the_merged_kernel():
    x, W, bias = randn(2, 3, 6, 5), randn(4, 3, 3, 2), randn(4)
    B, A = reference.factors(W.flatten(1), randn(4, 2), randn(2, 18))
    merged = torch.nn.functional.conv2d(x, W + (B @ A).view(W.shape), bias, 2, 1, 1)
    torch.testing.assert_close(reference.lowrank_conv2d(x, W, bias, B, A, 2, 1, 1), merged)
