"""A small training loop, and what keeps a run of it honest. The programs that trained the shipped models stand on it.

    masks        which positions carry loss, and a mean over them that micro-batches add up to
    schedule     shares of the peak learning rate, never above it
    precision    float32, bfloat16, or float16 with its gradient scaler
    average      the moving average of the weights that is kept
    guards       non-finite numbers traced to their module, and jumps of the loss
    checkpoint   everything a run goes on from: in memory for a roll-back, in a file for a resume
    trainer      the loop
    progress     what the terminal shows

Plain torch on the CPU; knows no model, no data and no tokens. Shares nothing with the serving packages.
"""
