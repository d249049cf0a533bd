// What the grid says of a choice. Everything shown was simulated: nothing lies between two stops.

/** A choice: indices of machine, load, burst and slowdown, the name of the work, and replicas. */
export function figuresOf(grid, choice) {
  const machine = grid.machines[choice.machine];
  const place = choice.load * grid.bursts.length + choice.burst;
  const work = machine.work[choice.work];
  const names = [...grid.chat_figures, ...grid.harvest_figures];
  const alone = named(grid.chat_figures, machine.alone[place]);
  const beside = named(names, work.beside[place][choice.slowdown]);
  const firstCome = named(names, work.first_come[place]);
  const dedicated = named(grid.harvest_figures, work.dedicated);
  const replicasSaved = (choice.replicas * beside.offline_tps) / dedicated.offline_tps;
  return {
    machine,
    alone,
    beside,
    firstCome,
    chatsPerSecond: grid.loads[choice.load] * machine.most_rps,
    shareOfBound: ratio(beside.offline_tps, firstCome.offline_tps),
    gpusSaved: replicasSaved * machine.num_gpus,
    gpus: choice.replicas * machine.num_gpus,
  };
}

/** The same at every stop of one slider. */
export function along(grid, choice, slider, stops) {
  return stops.map((_, index) => figuresOf(grid, { ...choice, [slider]: index }));
}

export function ratio(above, below) {
  return above === null || !below ? null : above / below;
}

function named(names, values) {
  return Object.fromEntries(names.map((name, index) => [name, values[index]]));
}
