# The cells of a notebook. In a script, put the last one under `if __name__ == "__main__":` and leave start_method out.

# %%
from macrobatch import launch


# %%
def work(epochs: int) -> float:
    import train  # train.py beside this notebook

    return train.train(epochs)


# %% On two ranks, one per GPU if num_processes is left out. Nothing may be on a GPU in the notebook itself.
# A notebook is forked anyway; said here so that this file runs as a script, too.
losses = launch.spawn(work, args=(2,), num_processes=2, start_method="fork")
print("the same on every rank:", losses)
