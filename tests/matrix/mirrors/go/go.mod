module sidestep.test/mirror

go 1.19
