target_sources(test_fuzz PRIVATE ${folder}/mutator.cpp ${folder}/forger.cpp ${folder}/targets.cpp)
