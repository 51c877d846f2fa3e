"""What TensorBoard shows of a run that was resumed."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.lib.journal import Journal


def test_a_resume_hides_what_came_after_the_checkpoint_and_nothing_else(tmp_path):
    for begin, end, value in ((0, 5, 1.0), (3, 6, 2.0)):
        journal = Journal(speaks=True)
        journal.open(tmp_path, step=begin, total_steps=6)
        for step in range(begin + 1, end + 1):
            journal.losses(epoch=1, step=step, critic=value)
        journal.close()
    shown = EventAccumulator(str(tmp_path / "logs"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss/critic")] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
