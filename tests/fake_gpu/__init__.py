"""A host that poses as one GPU with Transformer Engine, so that what needs both can be tested.

Processes have a CUDA device that is the CPU; Transformer Engine's Python runs as it is, around
kernels in plain PyTorch. It shows that the pieces fit and what eight bits do to the numbers,
nothing about speed, memory or the real kernels.

    python -m tests.fake_gpu -m moa_megatron.pretrain tiny-moe --set bf16=true --train-iters 20
    subprocess.run([sys.executable, ...], env={**os.environ, **te.fake_gpu()})  # in a test
"""
