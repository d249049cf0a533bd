"""Run by alembic on the connection that `Database.migrate` hands over."""

from alembic import context

from conserve.batch.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    compare_type=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
