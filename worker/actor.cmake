add_library(sc_worker STATIC trainer.cpp deputy_disk.cpp patrol.cpp worker_actor.cpp)
target_link_libraries(sc_worker PUBLIC sc_trainer sc_worker_core PRIVATE sc_coordinator_core
                      sc_checkpoint_keeper
                      sc_control_client sc_links sc_storage sc_log CAF::core PkgConfig::XXHASH)
